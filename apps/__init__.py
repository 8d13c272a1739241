"""Programs made of the runtime: the command line, the demonstration, benchmarks."""
