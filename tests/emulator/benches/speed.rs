//! Speed of the emulator's frequent instructions: `cargo bench -p cuda-emulator`.
//!
//! Prints one line a kind, for one core and for all; the best of several runs.

use std::sync::Arc;
use std::time::Instant;

use cuda_emulator::emulator;
use cudarc::driver::{CudaContext, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

/// Bytes of shared memory: a tile of 64 and one of 128 rows of 128 bytes.
const TILE: u32 = (64 + 128) * 128;
/// Copies of the measured instruction in a loop, warps of a block, runs of which the best counts.
const UNROLL: usize = 32;
const WARPS: u32 = 4;
const RUNS: usize = 3;

/// `wgmma` on bf16 with both operands in shared memory; its accumulators stand for `ACC`.
const WGMMA: &str =
    "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {ACC}, %da, %db, 1, 1, 1, 0, 0;";

/// An instruction to measure and what one execution by a warp counts for.
struct Case {
    name: &'static str,
    instruction: &'static str,
    work: f64,
    /// Loop iterations: enough for a tenth of a second.
    iterations: u32,
    unit: &'static str,
}

const CASES: [Case; 8] = [
    Case {
        name: "fma.rn.f32",
        instruction: "fma.rn.f32 %f0, %f0, %f1, %f2;",
        work: 32.0,
        iterations: 100_000,
        unit: "G lane-operations/s",
    },
    Case {
        name: "add.s32",
        instruction: "add.s32 %r0, %r0, %r1;",
        work: 32.0,
        iterations: 100_000,
        unit: "G lane-operations/s",
    },
    Case {
        name: "mma.m16n8k16.bf16",
        instruction: "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, {%f0, %f1, %f2, %f3};",
        work: 4096.0,
        iterations: 10_000,
        unit: "GFLOP/s",
    },
    Case {
        name: "wgmma.m64n128k16",
        instruction: WGMMA,
        // A warp computes 16 of the 64 rows.
        work: 65_536.0,
        iterations: 200,
        unit: "GFLOP/s",
    },
    Case {
        name: "ld.global.b32",
        instruction: "ld.global.b32 %r4, [%lane];",
        work: 32.0,
        iterations: 10_000,
        unit: "G lane-operations/s",
    },
    Case {
        name: "ld.global.v4.b32",
        instruction: "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%lane4];",
        work: 32.0,
        iterations: 10_000,
        unit: "G lane-operations/s",
    },
    Case {
        name: "ld.shared.b32",
        instruction: "ld.shared.b32 %r4, [%sh];",
        work: 32.0,
        iterations: 10_000,
        unit: "G lane-operations/s",
    },
    Case {
        name: "ldmatrix.x4",
        instruction: "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%sh4];",
        work: 32.0,
        iterations: 10_000,
        unit: "G lane-operations/s",
    },
];

fn ptx(case: &Case) -> String {
    let list = |name: &str| -> Vec<String> { (0..64).map(|i| format!("%{name}{i}")).collect() };
    let accumulators = list("w").join(", ");
    let instruction = case.instruction.replace("ACC", &accumulators);
    let mut body = format!("    {instruction}\n").repeat(UNROLL);
    if case.instruction == WGMMA {
        body = format!(
            "    wgmma.fence.sync.aligned;\n{body}    wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;"
        );
    }
    let zeros: String = list("w")
        .iter()
        .map(|w| format!("    mov.f32 {w}, 0f00000000;\n"))
        .collect();
    format!(
        ".version 8.0
.target sm_90a
.address_size 64
.visible .entry bench(.param .u64 data)
{{
    .reg .b64 %data, %lane, %lane4, %da, %db;
    .reg .f32 %f<4>, %w<64>;
    .reg .b32 %r<10>, %i, %t, %l, %sh, %sh4;
    .reg .pred %p;
    .shared .align 1024 .b8 tile[{TILE}];
    ld.param.u64 %data, [data];
    mov.u32 %t, %tid.x;
    mov.u32 %l, %laneid;
    mad.wide.u32 %lane, %l, 4, %data;
    mad.wide.u32 %lane4, %l, 16, %data;
    mov.u32 %sh4, tile;
    mad.lo.u32 %sh, %t, 4, %sh4;
    mad.lo.u32 %sh4, %t, 16, %sh4;
    mov.b32 %r0, 0;
    mov.u32 %i, %sh4;
FILL:
    st.shared.v4.b32 [%i], {{%r0, %r0, %r0, %r0}};
    add.u32 %i, %i, {};
    setp.lt.u32 %p, %i, {TILE};
    @%p bra FILL;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    // Rows of 128 bytes with the 128-byte swizzle: A's 64, then B's 128.
    mov.b64 %da, 0x4000004000010000;
    add.u64 %db, %da, 512;
{zeros}    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%lane4];
    ld.global.v2.b32 {{%r8, %r9}}, [%lane4];
    mov.f32 %f0, 0f3F800000;
    mov.f32 %f1, 0f3F7FFF00;
    mov.f32 %f2, 0f3A000000;
    mov.f32 %f3, 0f00000000;
    mov.b32 %r1, 3;
    mov.u32 %i, 0;
LOOP:
{body}
    add.u32 %i, %i, 1;
    setp.lt.u32 %p, %i, {};
    @%p bra LOOP;
    ret;
}}
",
        WARPS * 32 * 16,
        case.iterations,
    )
}

/// Processor time that this process's threads have used, on Linux.
fn busy_seconds() -> Option<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        nanoseconds += text.split(' ').next()?.parse::<f64>().ok()?;
    }
    Some(nanoseconds / 1e9)
}

/// Best work per second of a case over `blocks` blocks, in units of 10^9.
fn measure(stream: &Arc<CudaStream>, case: &Case, blocks: u32) -> f64 {
    let module = stream
        .context()
        .load_module(Ptx::from_src(ptx(case)))
        .expect("the bench's PTX");
    let kernel = module.load_function("bench").expect("the bench's kernel");
    let data = stream.alloc_zeros::<u8>(4096).expect("device memory");
    let config = LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (WARPS * 32, 1, 1),
        shared_mem_bytes: 0,
    };
    let executed = f64::from(blocks * WARPS) * f64::from(case.iterations) * UNROLL as f64;
    let run = |_| {
        let start = (Instant::now(), busy_seconds());
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&data);
        // SAFETY: the argument matches the kernel's parameter.
        unsafe { launch.launch(config) }.expect("a launch without findings");
        let wall = start.0.elapsed().as_secs_f64();
        // One block runs on one thread: its processor time is free of what else the machine does.
        let seconds = if blocks == 1 {
            busy_seconds()
                .zip(start.1)
                .map_or(wall, |(end, start)| end - start)
        } else {
            wall
        };
        executed * case.work / seconds / 1e9
    };
    (0..RUNS).map(run).fold(0.0, f64::max)
}

fn main() {
    // SAFETY: no other thread runs yet. wgmma needs a Hopper.
    unsafe { std::env::set_var("CUDA_EMU_DEVICE", "h100") };
    emulator().expect("the emulator");
    let stream = CudaContext::new(0).expect("a context").default_stream();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{:<20} {:>10} {:>10}  unit ({cores} cores)",
        "instruction", "one core", "all cores"
    );
    for case in &CASES {
        let one = measure(&stream, case, 1);
        let all = measure(&stream, case, 4 * cores as u32);
        println!("{:<20} {one:>10.2} {all:>10.2}  {}", case.name, case.unit);
    }
}
