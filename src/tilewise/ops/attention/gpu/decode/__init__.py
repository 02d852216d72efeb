"""Few queries against many keys, which are cut into chunks, and keys in pages."""
