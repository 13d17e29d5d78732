"""What every other package may use: threads and ISA level, names in messages, types of arguments, fingerprints."""
