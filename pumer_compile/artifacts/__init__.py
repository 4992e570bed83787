"""What exporters and runtimes share: formats, manifests, open sessions, and `Engine`, which runs any artifact."""
