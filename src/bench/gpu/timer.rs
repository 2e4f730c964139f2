//! Times on a GPU: events around what a run launches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DriverError};

use crate::bench::clock::{FEWEST, MOST};
use crate::bench::runs::Run;
use crate::bench::stats::Times;
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::tensor::cuda::error_name;

/// Runs before the first that counts.
const WARM_UP: usize = 3;
/// Small writes that keep the device busy while the host launches what is timed.
const SPACERS: usize = 32;
const SPACER: usize = 1 << 16;

/// Measures on one device's stream.
pub(super) struct Timer {
    device: Device,
    stream: Arc<CudaStream>,
    start: CudaEvent,
    end: CudaEvent,
    /// Twice the L2 cache: writing it leaves nothing else there.
    flush: CudaSlice<u8>,
    budget: Duration,
}

impl Timer {
    pub(super) fn new(cuda: &CudaDevice, budget: Duration) -> Result<Self> {
        let stream = cuda.stream().clone();
        let failed = |e| failed(&stream, "events", e);
        let context = stream.context();
        let event = || {
            context
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .map_err(failed)
        };
        Ok(Self {
            start: event()?,
            end: event()?,
            flush: stream.alloc_zeros(2 * l2_bytes(&stream)).map_err(failed)?,
            budget,
            device: Device::Cuda(cuda.clone()),
            stream,
        })
    }

    /// Times of `run`, with an L2 cache full of other data where `cold`, else as the repetition
    /// before left it.
    pub(super) fn times(&mut self, cold: bool, run: &mut dyn Run) -> Result<Times> {
        let device = self.device.clone();
        for _ in 0..WARM_UP {
            run.prepare(&device)?;
            run.run(&device)?;
        }
        let began = Instant::now();
        let mut seconds = Vec::new();
        while seconds.len() < FEWEST || (began.elapsed() < self.budget && seconds.len() < MOST) {
            run.prepare(&device)?;
            self.occupy(cold)?;
            self.record(&self.start)?;
            run.run(&device)?;
            self.record(&self.end)?;
            let elapsed = self.start.elapsed_ms(&self.end);
            let elapsed = elapsed.map_err(|e| self.failed("reading events", e))?;
            seconds.push(f64::from(elapsed) * 1e-3);
        }
        Times::of(seconds).ok_or_else(|| Error::operand("bench-kernels", "a time", "none"))
    }

    /// Times of copying `bytes` within the device.
    pub(super) fn copy_times(&mut self, bytes: usize) -> Result<Times> {
        let stream = self.stream.clone();
        let alloc = || stream.alloc_zeros::<u8>(bytes.max(1));
        let from = alloc().map_err(|e| self.failed("a copy's memory", e))?;
        let mut to = alloc().map_err(|e| self.failed("a copy's memory", e))?;
        let mut call = Call(|| {
            let copied = stream.memcpy_dtod(&from, &mut to);
            copied.map_err(|e| failed(&stream, "a copy within the device", e))
        });
        self.times(true, &mut call)
    }

    /// Writes, so that the device has something to do until the host has launched what is timed:
    /// over the whole L2 cache or over a small part of it.
    fn occupy(&mut self, cold: bool) -> Result<()> {
        let stream = self.stream.clone();
        let mut write = || match cold {
            true => stream.memset_zeros(&mut self.flush),
            false => (0..SPACERS).try_for_each(|_| {
                let mut part = self.flush.slice_mut(..SPACER);
                stream.memset_zeros(&mut part)
            }),
        };
        write().map_err(|e| failed(&stream, "clearing memory", e))
    }

    fn record(&self, event: &CudaEvent) -> Result<()> {
        let recorded = event.record(&self.stream);
        recorded.map_err(|e| self.failed("recording an event", e))
    }

    pub(super) fn failed(&self, what: &str, error: DriverError) -> Error {
        failed(&self.stream, what, error)
    }
}

fn failed(stream: &CudaStream, what: &str, error: DriverError) -> Error {
    let ordinal = stream.context().ordinal();
    Error::cuda(ordinal, format!("{what}: {}", error_name(error)))
}

/// Size of the L2 cache; 64 MiB where the driver does not say.
pub(super) fn l2_bytes(stream: &CudaStream) -> usize {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
    let bytes = stream.context().attribute(attribute).ok();
    bytes
        .and_then(|n| usize::try_from(n).ok())
        .filter(|&n| n >= SPACER)
        .unwrap_or(64 << 20)
}

/// What needs no preparation, as a [`Run`].
pub(super) struct Call<F>(pub F);

impl<F: FnMut() -> Result<()> + Send> Run for Call<F> {
    fn prepare(&mut self, _: &Device) -> Result<()> {
        Ok(())
    }

    fn run(&mut self, _: &Device) -> Result<()> {
        (self.0)()
    }
}
