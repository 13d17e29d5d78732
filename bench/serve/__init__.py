"""The server: throughput, fairness, and traffic that is hostile."""
