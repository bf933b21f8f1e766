"""Parts of programs: modules from cells and states to distributions."""
