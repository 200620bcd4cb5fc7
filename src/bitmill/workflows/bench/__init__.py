"""How fast it runs: single kernels against the memory they read, and whole models token by token."""
