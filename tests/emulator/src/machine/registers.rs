//! Register files of a warp: every register holds 32 lanes.

use half::{bf16, f16};

use crate::ptx::ops::{AnyReg, Reg};
use crate::ptx::program::Function;

/// Lanes of a warp.
pub const LANES: usize = 32;

/// Pattern of registers nothing has written.
const POISON: u32 = 0xdead_beef;

/// The register files of all frames of a warp; indices are relative to the current frame.
#[derive(Debug, Default)]
pub struct Registers {
    r32: Vec<[u32; LANES]>,
    r64: Vec<[u64; LANES]>,
    preds: Vec<u32>,
    base: Base,
    /// Carry flags of `add.cc` and its kin.
    pub carry: u32,
}

/// Start of a frame in each file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    r32: usize,
    r64: usize,
    preds: usize,
}

impl Base {
    /// Where the frame behind this one, of `function`, starts.
    pub fn after(self, function: &Function) -> Self {
        Self {
            r32: self.r32 + function.regs32 as usize,
            r64: self.r64 + function.regs64 as usize,
            preds: self.preds + function.preds as usize,
        }
    }
}

impl Registers {
    /// Drops all frames and opens the first one for `function`.
    pub fn reset(&mut self, function: &Function) {
        self.carry = 0;
        self.enter(Base::default(), function);
    }

    /// Opens a frame at `base`, fills in its constants and makes it current.
    pub fn enter(&mut self, base: Base, function: &Function) {
        self.base = base;
        let (end32, end64) = (
            base.r32 + function.regs32 as usize,
            base.r64 + function.regs64 as usize,
        );
        let end_preds = base.preds + function.preds as usize;
        self.r32.truncate(base.r32);
        self.r64.truncate(base.r64);
        self.preds.truncate(base.preds);
        self.r32.resize(end32, [POISON; LANES]);
        self.r64
            .resize(end64, [u64::from(POISON) << 32 | u64::from(POISON); LANES]);
        self.preds.resize(end_preds, 0);
        for &(reg, value) in &function.constants32 {
            self.r32[base.r32 + reg as usize] = [value; LANES];
        }
        for &(reg, value) in &function.constants64 {
            self.r64[base.r64 + reg as usize] = [value; LANES];
        }
        for &reg in &function.true_preds {
            self.preds[base.preds + reg as usize] = u32::MAX;
        }
    }

    /// The current frame.
    pub fn base(&self) -> Base {
        self.base
    }

    /// Makes the frame at `base` current.
    pub fn select(&mut self, base: Base) {
        self.base = base;
    }

    pub fn read32(&self, reg: Reg) -> &[u32; LANES] {
        &self.r32[self.base.r32 + reg as usize]
    }

    pub fn read64(&self, reg: Reg) -> &[u64; LANES] {
        &self.r64[self.base.r64 + reg as usize]
    }

    /// A register of either width, zero-extended.
    pub fn read_any(&self, reg: AnyReg) -> [u64; LANES] {
        if reg.wide {
            *self.read64(reg.index)
        } else {
            self.read32(reg.index).map(u64::from)
        }
    }

    pub fn pred(&self, reg: Reg) -> u32 {
        self.preds[self.base.preds + reg as usize]
    }

    pub fn set_pred(&mut self, reg: Reg, value: u32, exec: u32) {
        let slot = &mut self.preds[self.base.preds + reg as usize];
        *slot = *slot & !exec | value & exec;
    }

    #[inline(always)]
    pub fn write32(&mut self, reg: Reg, value: &[u32; LANES], exec: u32) {
        let slot = &mut self.r32[self.base.r32 + reg as usize];
        if exec == u32::MAX {
            *slot = *value;
            return;
        }
        for lane in 0..LANES {
            let keep = ((exec >> lane) & 1).wrapping_sub(1);
            slot[lane] = slot[lane] & keep | value[lane] & !keep;
        }
    }

    #[inline(always)]
    pub fn write64(&mut self, reg: Reg, value: &[u64; LANES], exec: u32) {
        let slot = &mut self.r64[self.base.r64 + reg as usize];
        if exec == u32::MAX {
            *slot = *value;
            return;
        }
        for lane in 0..LANES {
            let keep = u64::from((exec >> lane) & 1).wrapping_sub(1);
            slot[lane] = slot[lane] & keep | value[lane] & !keep;
        }
    }

    /// Writes a register of either width, truncating to it.
    pub fn write_any(&mut self, reg: AnyReg, value: &[u64; LANES], exec: u32) {
        if reg.wide {
            self.write64(reg.index, value, exec);
        } else {
            self.write32(reg.index, &value.map(|v| v as u32), exec);
        }
    }
}

/// A value a lane of a register holds.
pub trait Lane: Copy {
    /// `u32` or `u64`, the file it lives in.
    type Bits: Copy + Default;
    fn from_bits(bits: Self::Bits) -> Self;
    fn to_bits(self) -> Self::Bits;
    fn view(regs: &Registers, reg: Reg) -> &[Self::Bits; LANES];
    fn write(regs: &mut Registers, reg: Reg, value: &[Self::Bits; LANES], exec: u32);
}

macro_rules! lane {
    ($type:ty, $bits:ty, $view:ident, $write:ident, $from:expr, $to:expr) => {
        impl Lane for $type {
            type Bits = $bits;
            #[inline(always)]
            fn from_bits(bits: $bits) -> Self {
                $from(bits)
            }
            #[inline(always)]
            fn to_bits(self) -> $bits {
                $to(self)
            }
            #[inline(always)]
            fn view(regs: &Registers, reg: Reg) -> &[$bits; LANES] {
                regs.$view(reg)
            }
            #[inline(always)]
            fn write(regs: &mut Registers, reg: Reg, value: &[$bits; LANES], exec: u32) {
                regs.$write(reg, value, exec);
            }
        }
    };
}

lane!(u32, u32, read32, write32, |b| b, |v| v);
lane!(i32, u32, read32, write32, |b| b as i32, |v| v as u32);
lane!(u16, u32, read32, write32, |b| b as u16, u32::from);
lane!(i16, u32, read32, write32, |b| b as i16, |v| u32::from(
    v as u16
));
lane!(f32, u32, read32, write32, f32::from_bits, f32::to_bits);
lane!(
    f16,
    u32,
    read32,
    write32,
    |b| f16::from_bits(b as u16),
    |v: f16| u32::from(v.to_bits())
);
lane!(
    bf16,
    u32,
    read32,
    write32,
    |b| bf16::from_bits(b as u16),
    |v: bf16| u32::from(v.to_bits())
);
lane!(u64, u64, read64, write64, |b| b, |v| v);
lane!(i64, u64, read64, write64, |b| b as i64, |v| v as u64);
lane!(f64, u64, read64, write64, f64::from_bits, f64::to_bits);

/// `d = f(a)` on every lane.
#[inline(always)]
pub fn map1<A: Lane, D: Lane>(r: &mut Registers, exec: u32, d: Reg, a: Reg, f: impl Fn(A) -> D) {
    let mut out = [D::Bits::default(); LANES];
    let a = A::view(r, a);
    for lane in 0..LANES {
        out[lane] = f(A::from_bits(a[lane])).to_bits();
    }
    D::write(r, d, &out, exec);
}

/// `d = f(a, b)` on every lane.
#[inline(always)]
pub fn map2<A: Lane, B: Lane, D: Lane>(
    r: &mut Registers,
    exec: u32,
    d: Reg,
    s: [Reg; 2],
    f: impl Fn(A, B) -> D,
) {
    let mut out = [D::Bits::default(); LANES];
    let (a, b) = (A::view(r, s[0]), B::view(r, s[1]));
    for lane in 0..LANES {
        out[lane] = f(A::from_bits(a[lane]), B::from_bits(b[lane])).to_bits();
    }
    D::write(r, d, &out, exec);
}

/// `d = f(a, b, c)` on every lane.
#[inline(always)]
pub fn map3<A: Lane, B: Lane, C: Lane, D: Lane>(
    r: &mut Registers,
    exec: u32,
    d: Reg,
    s: [Reg; 3],
    f: impl Fn(A, B, C) -> D,
) {
    let mut out = [D::Bits::default(); LANES];
    let (a, b, c) = (A::view(r, s[0]), B::view(r, s[1]), C::view(r, s[2]));
    for lane in 0..LANES {
        out[lane] = f(
            A::from_bits(a[lane]),
            B::from_bits(b[lane]),
            C::from_bits(c[lane]),
        )
        .to_bits();
    }
    D::write(r, d, &out, exec);
}

/// The lanes for which `f(a, b)` holds.
#[inline(always)]
pub fn compare2<A: Lane>(r: &Registers, a: Reg, b: Reg, f: impl Fn(A, A) -> bool) -> u32 {
    let (a, b) = (A::view(r, a), A::view(r, b));
    let mut out = 0;
    for lane in 0..LANES {
        out |= u32::from(f(A::from_bits(a[lane]), A::from_bits(b[lane]))) << lane;
    }
    out
}
