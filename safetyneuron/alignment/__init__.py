"""The stages of Chen et al. (2025) on real models: (IA)³, supervised fine-tuning, then preferences."""
