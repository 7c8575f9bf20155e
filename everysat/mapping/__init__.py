"""The machinery of maps that are larger than memory: windows, where they are read from, who computes them, where they are kept."""
