"""What every comparison shares: hosts, texts, models, processes of engines, timing, tables and JSON."""
