use crate::model::Module;

/// The shape of a Qwen2 model (a Llama without attention bias is one whose `attention_bias` is
/// false).
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen2Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves a group of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Longest sequence that the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether the q, k and v projections have biases.
    pub attention_bias: bool,
}

impl Qwen2Config {
    /// (out features, in features) of a linear module.
    pub fn module_dims(&self, module: Module) -> (usize, usize) {
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        match module {
            Module::Q => (q, self.hidden_size),
            Module::K | Module::V => (kv, self.hidden_size),
            Module::O => (self.hidden_size, q),
            Module::Gate | Module::Up => (self.intermediate_size, self.hidden_size),
            Module::Down => (self.hidden_size, self.intermediate_size),
        }
    }
}
