"""Benchmarks as people have them on disk: tables, parquet files, pictures."""
