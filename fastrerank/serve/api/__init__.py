"""What a request says and what an answer shows, in each dialect of rerank APIs."""
