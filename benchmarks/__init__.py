"""The benchmarks: ``python -m benchmarks`` runs them all, ``python -m benchmarks.<part>`` runs one."""
