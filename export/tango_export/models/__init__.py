"""The parts that Video LLMs are made of, each written once for every form of its graph."""
