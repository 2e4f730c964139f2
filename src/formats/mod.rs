//! Files of other tools: safetensors, Hugging Face models, PEFT adapters, sparsify SAEs.
