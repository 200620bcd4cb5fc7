"""Which numbers can be stored, and in which bits. One file per format."""

from bitmill.formats.base import FORMATS, Format, GroupFormat, Params, ScalarFormat
from bitmill.formats.lookup import Lookup
from bitmill.formats.wrapper import Wrapper

__all__ = ["FORMATS", "Format", "GroupFormat", "Lookup", "Params", "ScalarFormat", "Wrapper"]
