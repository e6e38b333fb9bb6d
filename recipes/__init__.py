"""The experiments of the sources as studies, one YAML file each; `docs/sources.md` says what each one is."""
