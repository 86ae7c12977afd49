"""Model families: records, loading, folders, bundles."""
