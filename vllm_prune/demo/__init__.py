"""The demo: the reference checkpoint continues a source file, with and without eviction."""
