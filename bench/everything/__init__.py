"""All comparisons on a GPU in one run, or one by one within a time."""
