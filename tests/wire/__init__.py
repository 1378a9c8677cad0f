"""The tests of `wire`: bytes in, values out."""
