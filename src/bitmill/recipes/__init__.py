"""Named methods: one published method per file, as options and the recipe they make."""
