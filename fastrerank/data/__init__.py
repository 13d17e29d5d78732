"""Judged data, files of pairs and of documents."""
