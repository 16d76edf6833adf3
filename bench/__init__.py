"""The benchmark suite behind ``svdk bench`` (importable as ``svdk.bench``)."""
