"""What every floor may use: names in messages, types of arguments, fingerprints."""
