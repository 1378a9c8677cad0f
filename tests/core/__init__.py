"""The tests of `core`: decisions, in a world that is pretended."""
