"""Small helpers without torch: EasyDict, downloads with a cache, command lines, safe files."""

from .util import EasyDict as EasyDict
