//! Rates that NVIDIA publishes, and the times they would allow.

use serde::Serialize;

use super::counters::Counted;

/// A GPU's published rates, dense (without structured sparsity).
struct Published {
    name: &'static str,
    /// bf16 products added to f32 in tensor cores, FLOP a second.
    tensor: f64,
    /// f32 outside of tensor cores, FLOP a second.
    scalar: f64,
    /// Memory, bytes a second.
    memory: f64,
}

/// NVIDIA's data sheets of the A100 SXM4 80 GB (2021), L40S (2023) and H100 SXM5 (2023); the last
/// two give tensor rates with sparsity, which are halved here.
const GPUS: [Published; 3] = [
    Published {
        name: "A100",
        tensor: 312e12,
        scalar: 19.5e12,
        memory: 2.039e12,
    },
    Published {
        name: "L40S",
        tensor: 362e12,
        scalar: 91.6e12,
        memory: 0.864e12,
    },
    Published {
        name: "H100",
        tensor: 989.5e12,
        scalar: 67e12,
        memory: 3.35e12,
    },
];

/// Where the rates are from, and what a time made of them is worth.
pub(in crate::bench) const SOURCE: &str = "least times by the published rates of A100 SXM4 80 GB \
    (312 TFLOP/s bf16, 2039 GB/s), L40S (362, 864) and H100 SXM5 (989, 3350), from NVIDIA's data \
    sheets: an estimate from counted FLOP and least bytes, not a measurement";

/// The time that a GPU would take at least.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Which GPU.
    pub gpu: &'static str,
    /// Seconds at its published rates.
    pub seconds: f64,
}

/// By the FLOP that were counted and the least bytes: a roofline.
pub(super) fn estimates(counted: &Counted, least_bytes: f64) -> Vec<Estimate> {
    let seconds = |gpu: &Published| {
        let tensor = counted.mma_flop / gpu.tensor;
        let scalar = counted.scalar_flop / gpu.scalar;
        tensor.max(scalar).max(least_bytes / gpu.memory)
    };
    let each = GPUS.iter().map(|gpu| Estimate {
        gpu: gpu.name,
        seconds: seconds(gpu),
    });
    each.collect()
}

/// The published tensor rate of the device of that name.
pub(super) fn tensor_rate(device: &str) -> Option<f64> {
    let gpu = GPUS.iter().find(|gpu| device.contains(gpu.name))?;
    Some(gpu.tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_of_the_three_resources_decides() {
        let on_a100 = |mma_flop, scalar_flop, bytes| {
            let counted = Counted {
                mma_flop,
                scalar_flop,
                ..Counted::default()
            };
            estimates(&counted, bytes)[0].seconds
        };
        assert_eq!(on_a100(312e9, 0.0, 1.0), 1e-3);
        assert_eq!(on_a100(1.0, 19.5e9, 1.0), 1e-3);
        assert_eq!(on_a100(1.0, 1.0, 2.039e9), 1e-3);
    }
}
