//! The matrix registers of Intel's processors (AMX): eight tiles of 16 rows of 64 bytes.

#[cfg(target_arch = "x86_64")]
use std::{arch::asm, marker::PhantomData};

/// Whether the machine multiplies tiles of bf16 values (`tdpbf16ps`) and the system lets this
/// process do so. Linux wants to be asked, which is done once.
#[inline]
pub(crate) fn available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        use std::sync::LazyLock;
        static AVAILABLE: LazyLock<bool> =
            LazyLock::new(|| super::simd::multiplies_bf16() && machine_has_it() && permitted());
        *AVAILABLE
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    {
        false
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn machine_has_it() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

/// Asks Linux to save the tiles when it switches threads, all threads of this process.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call takes two numbers and reads or writes no memory of this process; a system
    // call changes rcx and r11 beside its result.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// The tiles of this thread, configured to their full size for as long as the value lives. What
/// else runs on the thread meanwhile must leave them alone.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Tiles {
    /// Registers are a thread's own: the value stays there.
    thread: PhantomData<*const ()>,
}

#[cfg(target_arch = "x86_64")]
impl Tiles {
    /// # Safety
    /// [`available`] has said yes.
    pub(crate) unsafe fn new() -> Self {
        #[repr(align(64))]
        struct Configuration([u8; 64]);
        const TILES: usize = 8;
        let mut configuration = Configuration([0; 64]);
        let bytes = &mut configuration.0;
        // The palette, then from 16 on the bytes of a row in 16 bits, from 48 on the rows.
        bytes[0] = 1;
        for tile in 0..TILES {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
        }
        // SAFETY: reads 64 bytes, and the caller says that the machine has the instruction.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags));
        }
        Self {
            thread: PhantomData,
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made the value says that the machine has the instruction.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
