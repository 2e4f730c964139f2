//! Tensor maps: descriptions of tiles in global memory for bulk tensor copies.
//!
//! The 128 bytes are the emulator's own layout; programs treat them as opaque.

use crate::ptx::ast::Type;

/// Bytes of a `CUtensorMap`.
pub const BYTES: usize = 128;
/// Most dimensions.
pub const MAX_RANK: usize = 5;
/// Marks maps that the emulator encoded.
const MAGIC: u64 = 0x7061_6d75_6d65_7564;

/// Swizzles of the 16-byte chunks in shared memory, by the bytes of their rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    None,
    Bytes32,
    Bytes64,
    Bytes128,
}

impl Swizzle {
    /// The driver API's number.
    pub fn from_code(code: u32) -> Option<Self> {
        [
            Swizzle::None,
            Swizzle::Bytes32,
            Swizzle::Bytes64,
            Swizzle::Bytes128,
        ]
        .get(code as usize)
        .copied()
    }

    /// Where a shared-memory address really lies: bits 4 to 6 are xored with bits 7 to 9, as
    /// many of them as the row has.
    #[inline]
    pub fn apply(self, address: u64) -> u64 {
        let mask = match self {
            Swizzle::None => 0,
            Swizzle::Bytes32 => 1,
            Swizzle::Bytes64 => 3,
            Swizzle::Bytes128 => 7,
        };
        address ^ (address >> 7 & mask) << 4
    }

    /// Largest inner dimension of a box, in bytes.
    pub fn row_bytes(self) -> Option<u32> {
        match self {
            Swizzle::None => None,
            Swizzle::Bytes32 => Some(32),
            Swizzle::Bytes64 => Some(64),
            Swizzle::Bytes128 => Some(128),
        }
    }
}

/// A tiled tensor map; dimension 0 is the innermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    pub base: u64,
    pub rank: usize,
    /// The driver API's number of the element type.
    pub data_type: u32,
    pub element_bytes: u32,
    pub dims: [u64; MAX_RANK],
    /// Bytes between neighbours in dimensions 1 and up; entry 0 is the element size.
    pub strides: [u64; MAX_RANK],
    pub box_dims: [u32; MAX_RANK],
    pub element_strides: [u32; MAX_RANK],
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// The map as 16 words.
    pub fn encode(&self) -> [u64; BYTES / 8] {
        let mut out = [0; BYTES / 8];
        out[0] = MAGIC;
        out[1] = self.base;
        out[2] = self.rank as u64
            | u64::from(self.element_bytes) << 8
            | (self.swizzle as u64) << 16
            | u64::from(self.data_type) << 24;
        for i in 0..MAX_RANK {
            // Dimensions have at most 33 bits, boxes 9, element strides 4.
            let (boxed, step) = (
                u64::from(self.box_dims[i]),
                u64::from(self.element_strides[i]),
            );
            out[3 + i] = self.dims[i] | boxed << 40 | step << 52;
            out[8 + i] = self.strides[i];
        }
        out
    }

    /// Reads a map back; None for bytes the emulator did not encode.
    pub fn decode(words: &[u64; BYTES / 8]) -> Option<Self> {
        if words[0] != MAGIC {
            return None;
        }
        let field = |i: usize, shift: u32, bits: u32| words[3 + i] >> shift & ((1 << bits) - 1);
        Some(Self {
            base: words[1],
            rank: (words[2] & 0xff) as usize,
            element_bytes: (words[2] >> 8 & 0xff) as u32,
            data_type: (words[2] >> 24 & 0xff) as u32,
            swizzle: Swizzle::from_code((words[2] >> 16 & 0xff) as u32)?,
            dims: std::array::from_fn(|i| field(i, 0, 40)),
            strides: std::array::from_fn(|i| words[8 + i]),
            box_dims: std::array::from_fn(|i| field(i, 40, 12) as u32),
            element_strides: std::array::from_fn(|i| field(i, 52, 8) as u32),
        })
    }

    /// Type of the elements, as reductions see them.
    pub fn element_type(&self) -> Type {
        use Type::{B8, B16, Bf16, F16, F32, F64, S32, S64, U32, U64};
        let types = [B8, B16, U32, S32, U64, S64, F16, F32, F64, Bf16, F32];
        types.get(self.data_type as usize).copied().unwrap_or(F32)
    }

    /// Bytes of a box in shared memory.
    pub fn box_bytes(&self) -> u64 {
        let elements: u64 = self.box_dims[..self.rank]
            .iter()
            .map(|&b| u64::from(b))
            .product();
        elements * u64::from(self.element_bytes)
    }

    /// Calls `f(offset in the box, global address)` for every element of the box at these
    /// coordinates; the address is None outside the tensor.
    pub fn each_element(&self, coordinates: &[i32], mut f: impl FnMut(u64, Option<u64>)) {
        let elements = self.box_bytes() / u64::from(self.element_bytes);
        let mut index = [0u32; MAX_RANK];
        for n in 0..elements {
            let mut address = Some(self.base);
            for d in 0..self.rank {
                let at = i64::from(coordinates[d]) + i64::from(index[d] * self.element_strides[d]);
                let inside = at >= 0 && (at as u64) < self.dims[d];
                address = address
                    .filter(|_| inside)
                    .map(|a| a + at as u64 * self.strides[d]);
            }
            f(n * u64::from(self.element_bytes), address);
            for d in 0..self.rank {
                index[d] += 1;
                if index[d] < self.box_dims[d] {
                    break;
                }
                index[d] = 0;
            }
        }
    }
}
