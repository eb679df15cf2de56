"""Every command of `slim-brain`, a module each with `main(argv) -> exit status`."""
