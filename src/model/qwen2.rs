//! Qwen2 (Yang et al. 2024, arXiv 2407.10671); a Llama without attention bias is the same
//! network without the q, k and v biases.

use crate::device::CudaDevice;
use crate::error::Result;
use crate::model::{Module, Qwen2Config};
use crate::tensor::{DType, Tensor};

/// An affine map Y = X Wᵀ + bias.
#[derive(Clone, Debug)]
pub struct Linear {
    /// \[out, in\], f32 in memory or mapped f32, f16 or bf16
    pub weight: Tensor,
    /// \[out\], f32
    pub bias: Option<Tensor>,
}

/// The weights of one decoder layer; d is the hidden size, f the intermediate size, H the
/// number of heads, G that of key/value heads, h the size of a head.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// Scale of the RMSNorm before attention, \[d\], f32
    pub input_norm: Tensor,
    /// \[H h, d\]
    pub q: Linear,
    /// \[G h, d\]
    pub k: Linear,
    /// \[G h, d\]
    pub v: Linear,
    /// \[d, H h\]
    pub o: Linear,
    /// Scale of the RMSNorm before the MLP, \[d\], f32
    pub post_attention_norm: Tensor,
    /// \[f, d\]
    pub gate: Linear,
    /// \[f, d\]
    pub up: Linear,
    /// \[d, f\]
    pub down: Linear,
}

impl DecoderLayer {
    /// The linear map of a module.
    pub fn module(&self, module: Module) -> &Linear {
        match module {
            Module::Q => &self.q,
            Module::K => &self.k,
            Module::V => &self.v,
            Module::O => &self.o,
            Module::Gate => &self.gate,
            Module::Up => &self.up,
            Module::Down => &self.down,
        }
    }

    /// The linear map of a module, to change it.
    pub fn module_mut(&mut self, module: Module) -> &mut Linear {
        match module {
            Module::Q => &mut self.q,
            Module::K => &mut self.k,
            Module::V => &mut self.v,
            Module::O => &mut self.o,
            Module::Gate => &mut self.gate,
            Module::Up => &mut self.up,
            Module::Down => &mut self.down,
        }
    }
}

/// A Qwen2 model's weights; V is the vocabulary size, d the hidden size.
#[derive(Clone, Debug)]
pub struct Qwen2 {
    /// The shapes that the tensors have.
    pub config: Qwen2Config,
    /// \[V, d\], as stored
    pub embed_tokens: Tensor,
    /// In the order of a forward pass.
    pub layers: Vec<DecoderLayer>,
    /// Scale of the last RMSNorm, \[d\], f32
    pub norm: Tensor,
    /// \[V, d\]; shares the embedding's storage when the two are tied
    pub lm_head: Tensor,
}

impl Qwen2 {
    /// Brings the linear maps of `layers`, and the output head where asked, into bf16: what a
    /// file has in another type is rounded into memory, the rest stays where it is.
    pub fn narrow(&mut self, layers: std::ops::Range<usize>, head: bool) -> Result<()> {
        for layer in self.layers.get_mut(layers).into_iter().flatten() {
            for module in Module::ALL {
                let linear = layer.module_mut(module);
                linear.weight = linear.weight.to_bf16()?;
            }
        }
        if head {
            self.lm_head = self.lm_head.to_bf16()?;
        }
        Ok(())
    }

    /// Brings the linear maps of `layers`, and the output head where asked, into f32 in memory.
    pub fn widen(&mut self, layers: std::ops::Range<usize>, head: bool) -> Result<()> {
        for layer in self.layers.get_mut(layers).into_iter().flatten() {
            for module in Module::ALL {
                let linear = layer.module_mut(module);
                linear.weight = linear.weight.to_f32()?;
            }
        }
        if head {
            self.lm_head = self.lm_head.to_f32()?;
        }
        Ok(())
    }

    /// Copies the embedding, the weights of `layers` and, where asked, the output head with its
    /// norm to a GPU, in bf16. What is there already stays as it is.
    ///
    /// # Errors
    /// Out of device memory.
    pub fn upload(
        &mut self,
        cuda: &CudaDevice,
        layers: std::ops::Range<usize>,
        head: bool,
    ) -> Result<()> {
        let upload = |tensor: &mut Tensor| -> Result<()> {
            *tensor = cuda.resident(tensor, DType::Bf16)?;
            Ok(())
        };
        let tied = self.lm_head.shares_storage(&self.embed_tokens);
        upload(&mut self.embed_tokens)?;
        if tied {
            self.lm_head = self.embed_tokens.reshape(self.lm_head.shape())?;
        }
        for layer in self.layers.get_mut(layers).into_iter().flatten() {
            upload(&mut layer.input_norm)?;
            upload(&mut layer.post_attention_norm)?;
            for module in Module::ALL {
                let linear = layer.module_mut(module);
                upload(&mut linear.weight)?;
                linear.bias.as_mut().map_or(Ok(()), upload)?;
            }
        }
        if head {
            upload(&mut self.norm)?;
            upload(&mut self.lm_head)?;
        }
        Ok(())
    }
}
