//! A module ready to execute.

use std::collections::HashMap;

use super::ast::{SourceLocation, Variable};
use super::ops::{AnyReg, FixedSpecial, Inst, Reg};

/// Top byte of generic addresses that are not global ones.
pub const WINDOW_SHIFT: u32 = 56;
/// Generic window of shared memory.
pub const SHARED_WINDOW: u64 = 1 << WINDOW_SHIFT;
/// Bits 24 to 31 of a shared address are 0 or one more than the rank of the block of the cluster
/// whose memory is meant.
pub const CLUSTER_SHIFT: u32 = 24;
/// Generic window of a thread's local memory.
pub const LOCAL_WINDOW: u64 = 2 << WINDOW_SHIFT;
/// Generic window of kernel parameters.
pub const PARAM_WINDOW: u64 = 3 << WINDOW_SHIFT;
/// Addresses of device functions.
pub const FUNCTION_WINDOW: u64 = 4 << WINDOW_SHIFT;
/// Offset part of a windowed address.
pub const WINDOW_MASK: u64 = (1 << WINDOW_SHIFT) - 1;

/// A kernel or device function, lowered.
#[derive(Clone, Debug, Default)]
pub struct Function {
    pub name: String,
    pub is_entry: bool,
    pub code: Vec<Inst>,
    /// Sizes of the register files.
    pub regs32: u32,
    pub regs64: u32,
    pub preds: u32,
    pub constants32: Vec<(Reg, u32)>,
    pub constants64: Vec<(Reg, u64)>,
    pub true_preds: Vec<Reg>,
    pub specials: Vec<(AnyReg, FixedSpecial)>,
    /// Bytes of local memory of one frame, a multiple of 16.
    pub local_size: u32,
    /// Offset and size of each parameter: in the parameter bank of a kernel, in the frame's
    /// local memory of a device function.
    pub params: Vec<(u32, u32)>,
    pub param_bytes: u32,
    pub returns: Vec<(u32, u32)>,
    /// Static shared memory in bytes.
    pub shared_size: u32,
    /// Offset at which dynamic shared memory starts.
    pub dynamic_shared: u32,
    pub max_threads: Option<[u32; 3]>,
    pub required_threads: bool,
    pub cluster: Option<[u32; 3]>,
    pub locations: Vec<SourceLocation>,
    /// 32-bit registers that instructions name, one instruction after the other, and whether it
    /// is to write them.
    pub uses: Vec<(Reg, bool)>,
}

impl Function {
    /// Shared memory of a block in bytes; without dynamic memory there is no padding before it.
    pub fn shared_bytes(&self, dynamic: u32) -> u32 {
        match dynamic {
            0 => self.shared_size,
            bytes => self.dynamic_shared.saturating_add(bytes),
        }
    }
}

/// A loaded module.
#[derive(Debug, Default)]
pub struct Program {
    pub functions: Vec<Function>,
    /// Kernels by name: index into `functions`.
    pub kernels: HashMap<String, usize>,
    /// Device addresses of global and constant variables.
    pub globals: HashMap<String, (u64, u64)>,
    pub files: HashMap<u32, String>,
    pub version: u32,
    pub target: u32,
    /// Lines of the PTX text, for messages.
    pub lines: Vec<String>,
}

impl Program {
    /// The source position as `file:line`, with the place it was inlined at.
    pub fn describe(&self, location: &SourceLocation) -> String {
        let name = |file: u32| self.files.get(&file).map_or("?", String::as_str);
        match location.inlined_at {
            Some((file, line)) => {
                format!(
                    "{}:{} inlined at {}:{line}",
                    name(location.file),
                    location.line,
                    name(file)
                )
            }
            None => format!("{}:{}", name(location.file), location.line),
        }
    }
}

/// Bytes of a variable's initialiser, given the addresses of symbols.
///
/// # Errors
/// A symbol that has no address, or more values than the variable holds.
pub fn initial_bytes(
    variable: &Variable,
    address_of: &dyn Fn(&str) -> Option<u64>,
) -> Result<Vec<u8>, String> {
    use super::ast::Initial;
    let width = variable.ty.bytes() as usize;
    let mut out = Vec::with_capacity(variable.initial.len() * width);
    for value in &variable.initial {
        let bits = match value {
            Initial::Bits(bits) => *bits,
            Initial::Symbol(name, offset) => address_of(name)
                .ok_or_else(|| format!("initialiser of {}: unknown symbol {name}", variable.name))?
                .wrapping_add_signed(*offset),
        };
        out.extend(bits.to_le_bytes().iter().take(width));
    }
    if out.len() as u64 > variable.size {
        return Err(format!(
            "initialiser of {} has more values than the variable",
            variable.name
        ));
    }
    Ok(out)
}
