"""The encoder in C++ for CPUs."""
