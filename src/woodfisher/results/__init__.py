"""What a person reads of a run: figures by layer, pictures and the page."""
