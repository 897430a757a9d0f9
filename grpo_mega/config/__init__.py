"""The configuration of a run: schema, loading, rules between keys."""
