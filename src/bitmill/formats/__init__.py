"""Which numbers can be stored, and in which bits. One file per format."""

from bitmill.formats.base import FORMATS, Format, Params, ScalarFormat, format_from_dict

__all__ = ["FORMATS", "Format", "Params", "ScalarFormat", "format_from_dict"]
