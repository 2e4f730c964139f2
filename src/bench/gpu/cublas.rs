//! The peer of matrix products: NVIDIA's cuBLASLt, where it is installed.

use std::sync::Arc;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig};
use cudarc::driver::{CudaSlice, CudaStream, DriverError};
use half::bf16;

use super::timer::{Call, Timer};
use crate::bench::stats::Times;
use crate::bench::work::Pass;
use crate::error::{Error, Result};

/// cuBLASLt on the device's stream.
pub(super) struct Cublas {
    lt: CudaBlasLT,
    stream: Arc<CudaStream>,
}

/// Operands of Y = X Wᵀ or dX = dY W, all row-major.
struct Product {
    config: MatmulConfig,
    weight: CudaSlice<bf16>,
    rows: CudaSlice<bf16>,
    out: CudaSlice<bf16>,
}

impl Cublas {
    /// `None` where the library is not found or does not start.
    pub(super) fn load(stream: &Arc<CudaStream>) -> Option<Self> {
        // SAFETY: loading NVIDIA's library runs its initialisers, as every program that uses it.
        let present = unsafe { cudarc::cublaslt::sys::is_culib_present() };
        let stream = stream.clone();
        present
            .then(|| CudaBlasLT::new(stream.clone()).ok())
            .flatten()
            .map(|lt| Self { lt, stream })
    }

    /// Times of the product of a pass of Y = X Wᵀ, X \[tokens, inner\], W \[out, inner\], in bf16.
    pub(super) fn times(
        &self,
        timer: &mut Timer,
        pass: Pass,
        [tokens, inner, out]: [usize; 3],
    ) -> Result<Times> {
        let mut product = self
            .product(pass, [tokens, inner, out])
            .map_err(|e| timer.failed("cuBLASLt's operands", e))?;
        let lt = &self.lt;
        let mut call = Call(|| {
            let Product {
                config,
                weight,
                rows,
                out,
            } = &mut product;
            // SAFETY: `product` made the matrices of the sizes that `config` states.
            let done = unsafe { lt.matmul(*config, weight, rows, out, None, None) };
            let failed = |e: CublasError| {
                Error::operand("bench-kernels", "a product by cuBLASLt", e.to_string())
            };
            done.map_err(failed)
        });
        timer.times(true, &mut call)
    }

    /// cuBLASLt's matrices are column-major: a row-major matrix is its own transpose there, so
    /// Yᵀ = W Xᵀ and dXᵀ = Wᵀ dYᵀ are asked for.
    fn product(
        &self,
        pass: Pass,
        [tokens, inner, out]: [usize; 3],
    ) -> std::result::Result<Product, DriverError> {
        let forward = pass == Pass::Forward;
        let (m, k) = if forward { (out, inner) } else { (inner, out) };
        let config = MatmulConfig {
            transa: forward,
            transb: false,
            transc: false,
            m: m as u64,
            n: tokens as u64,
            k: k as u64,
            alpha: 1.0,
            lda: inner as i64,
            ldb: k as i64,
            beta: 0.0,
            ldc: m as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        Ok(Product {
            config,
            weight: self.stream.clone_htod(&random(out * inner))?,
            rows: self.stream.clone_htod(&random(tokens * k))?,
            out: self.stream.alloc_zeros(tokens * m)?,
        })
    }
}

/// Values in [-1, 1) of a linear congruential generator (Numerical Recipes): a GPU that
/// multiplies constants switches fewer wires and clocks higher than in real work.
fn random(len: usize) -> Vec<bf16> {
    let mut state = 1u32;
    let mut values = Vec::with_capacity(len);
    for _ in 0..len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        values.push(bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0));
    }
    values
}
