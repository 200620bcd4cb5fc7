"""Formats: the numbers that can be stored, and their bits. One file per format."""

from bitmill.formats.base import FORMATS, Format, GroupFormat, Params
from bitmill.formats.lookup import Lookup
from bitmill.formats.scalar import ScalarFormat
from bitmill.formats.wrapper import Wrapper

__all__ = ["FORMATS", "Format", "GroupFormat", "Lookup", "Params", "ScalarFormat", "Wrapper"]
