"""The engine that is vLLM's: it pages, batches and decodes; what is fused comes to it from here."""
