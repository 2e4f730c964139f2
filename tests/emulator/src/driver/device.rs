//! The emulated devices: limits and attributes, no speed.

/// A GPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub name: &'static str,
    pub major: u32,
    pub minor: u32,
    pub sm_count: u32,
    /// Bytes of device memory.
    pub memory: u64,
    /// Shared memory of an SM, and the most a block may opt in to.
    pub shared_per_sm: u32,
    pub shared_opt_in: u32,
    pub threads_per_sm: u32,
    pub blocks_per_sm: u32,
    pub l2_bytes: u32,
    pub clock_khz: u32,
    pub memory_clock_khz: u32,
    pub bus_bits: u32,
}

/// Shared memory a block may use without opting in.
pub const SHARED_DEFAULT: u32 = 48 << 10;
/// Threads of a block.
pub const MAX_THREADS: u32 = 1024;
/// Largest block dimensions.
pub const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
/// Largest grid dimensions.
pub const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];

const A100: Device = Device {
    name: "NVIDIA A100-SXM4-80GB (emulated)",
    major: 8,
    minor: 0,
    sm_count: 108,
    memory: 80 << 30,
    shared_per_sm: 164 << 10,
    shared_opt_in: 163 << 10,
    threads_per_sm: 2048,
    blocks_per_sm: 32,
    l2_bytes: 40 << 20,
    clock_khz: 1_410_000,
    memory_clock_khz: 1_593_000,
    bus_bits: 5120,
};

const H100: Device = Device {
    name: "NVIDIA H100 80GB HBM3 (emulated)",
    major: 9,
    sm_count: 132,
    shared_per_sm: 228 << 10,
    shared_opt_in: 227 << 10,
    l2_bytes: 50 << 20,
    clock_khz: 1_980_000,
    memory_clock_khz: 2_619_000,
    ..A100
};

const L40S: Device = Device {
    name: "NVIDIA L40S (emulated)",
    major: 8,
    minor: 9,
    sm_count: 142,
    memory: 48 << 30,
    shared_per_sm: 100 << 10,
    shared_opt_in: 99 << 10,
    threads_per_sm: 1536,
    blocks_per_sm: 24,
    l2_bytes: 96 << 20,
    clock_khz: 2_520_000,
    memory_clock_khz: 9_001_000,
    bus_bits: 384,
};

/// Older than what PTX for compute capability 8.0 runs on.
const V100: Device = Device {
    name: "Tesla V100-SXM2-32GB (emulated)",
    major: 7,
    minor: 0,
    sm_count: 80,
    memory: 32 << 30,
    shared_per_sm: 96 << 10,
    shared_opt_in: 96 << 10,
    l2_bytes: 6 << 20,
    clock_khz: 1_530_000,
    memory_clock_khz: 877_000,
    bus_bits: 4096,
    ..A100
};

impl Device {
    /// The device `CUDA_EMU_DEVICE` names; an A100 without it.
    ///
    /// # Errors
    /// A name that is none of `a100`, `h100`, `l40s`, `v100`.
    pub fn from_name(name: Option<&str>) -> Result<Self, String> {
        match name.map(str::to_ascii_lowercase).as_deref() {
            None | Some("" | "a100") => Ok(A100),
            Some("h100") => Ok(H100),
            Some("l40s") => Ok(L40S),
            Some("v100") => Ok(V100),
            Some(other) => Err(format!(
                "CUDA_EMU_DEVICE is `{other}`, expected a100, h100, l40s or v100"
            )),
        }
    }

    /// Compute capability as in `sm_80`.
    pub fn capability(&self) -> u32 {
        self.major * 10 + self.minor
    }

    /// Value of a `CUdevice_attribute`; attributes that are not emulated are 0.
    pub fn attribute(&self, attribute: i32) -> u32 {
        match attribute {
            1 => MAX_THREADS,
            2 => MAX_BLOCK[0],
            3 => MAX_BLOCK[1],
            4 => MAX_BLOCK[2],
            5 => MAX_GRID[0],
            6 => MAX_GRID[1],
            7 => MAX_GRID[2],
            8 => SHARED_DEFAULT,
            9 => 64 << 10,
            10 => 32,
            11 => i32::MAX as u32,
            12 | 82 => 64 << 10,
            13 => self.clock_khz,
            14 => 512,
            16 => self.sm_count,
            19 | 31 | 41 => 1,
            36 => self.memory_clock_khz,
            37 => self.bus_bits,
            38 => self.l2_bytes,
            39 => self.threads_per_sm,
            75 => self.major,
            76 => self.minor,
            81 => self.shared_per_sm,
            97 => self.shared_opt_in,
            106 => self.blocks_per_sm,
            111 => 1 << 10,
            // Cooperative and cluster launches.
            95 => 1,
            120 => u32::from(self.major >= 9),
            // Memory pools: cuMemAllocAsync works.
            115 => 1,
            _ => 0,
        }
    }
}
