"""Requests of many callers in shared batches (`batcher`), and the HTTP server on top of them (`app`)."""
