"""The HTTP service: datasets, align jobs, the adapter registry and answers. It owns the schema and the job life cycle."""
