"""The tests of the pool in real workers, on the filesystem broker."""
