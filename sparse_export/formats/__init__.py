"""What lies on disk, one module a document: records, reading and writing them."""
