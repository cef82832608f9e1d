"""The `openai` engine: another server that speaks OpenAI's API (vLLM) answers, and no torch is loaded here (docs/decisions/0066)."""
