"""Raw corpora to a LLaMA-Factory dataset_dir: registry, raw files, layouts, conversion, download, filters, audit."""
