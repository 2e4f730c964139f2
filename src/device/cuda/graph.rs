//! A part of a computation that is the same each time, recorded as a CUDA graph and launched as
//! one: the driver then has one call to take instead of one for each kernel.

use std::cell::RefCell;
use std::fmt;

use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::CudaDevice;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::cuda::error_name;
use crate::tensor::{CudaBuffer, DType, Tensor};

/// What was recorded, with memory of its own: inputs that each run copies to, outputs, and what
/// lies between. Nobody else's tensors are in that memory, so that a run writes to no one's, and a
/// run allocates nothing but copies of its outputs.
pub(crate) struct Recorded {
    /// Launched one after the other.
    graphs: Vec<CudaGraph>,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    device: CudaDevice,
}

// SAFETY: a graph may be used by one thread at a time, which `run` sees to by taking `self` as
// mutable; nothing in it belongs to a thread.
unsafe impl Send for Recorded {}

/// Ends a graph of a recording and begins the next.
pub(crate) type Cut<'a> = &'a dyn Fn() -> Result<()>;

impl CudaDevice {
    /// Records what `work` launches for inputs of these shapes and dtypes, on this device or (f32
    /// and u32) on the host. It is given a device whose memory is the recording's own, and inputs
    /// there, and is called twice: so that its kernels are loaded and all memory is there, and to
    /// be recorded. What else it reads is read where it lies now, and must lie there in each run.
    /// Where it calls the function that it is given, a graph ends and another begins: the device is
    /// at work on the first while the host launches the second, which takes longer the more kernels
    /// there are.
    ///
    /// # Errors
    /// Those of `work`; work that copies between host and device, which would copy the same host
    /// memory each time.
    pub(crate) fn record(
        &self,
        inputs: &[&Tensor],
        work: impl Fn(&Device, &[Tensor], Cut) -> Result<Vec<Tensor>>,
    ) -> Result<Recorded> {
        let own = self.beside();
        let inputs = inputs.iter().map(|input| own.copied(input));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let device = Device::Cuda(own.clone());
        drop(work(&device, &inputs, &|| Ok(()))?);
        let failed = |e| {
            Error::cuda(
                self.ordinal(),
                format!("recording a graph: {}", error_name(e)),
            )
        };
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let begin = || self.stream.begin_capture(mode).map_err(failed);
        let graphs = RefCell::new(Vec::new());
        let end = || {
            let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
            let nothing = || Error::operand("graph", "work that launches a kernel", "none");
            let graph = graph.map_err(failed)?.ok_or_else(nothing)?;
            graphs.borrow_mut().push(graph);
            Ok(())
        };
        begin()?;
        let outputs = work(&device, &inputs, &|| end().and_then(|()| begin()));
        // Ended whatever came of it: the stream records until then.
        let ended = end();
        let outputs = outputs?;
        ended?;
        let graphs = graphs.into_inner();
        Ok(Recorded {
            graphs,
            inputs,
            outputs,
            device: own,
        })
    }

    /// The same device with memory of its own.
    fn beside(&self) -> Self {
        Self {
            memory: self.memory.beside().into(),
            ..self.clone()
        }
    }

    /// A copy of a tensor of this device or of the host in this device's memory.
    ///
    /// # Errors
    /// As for [`CudaDevice::record`]'s inputs.
    pub(crate) fn copied(&self, tensor: &Tensor) -> Result<Tensor> {
        let mut copy = self.alloc(tensor.dtype(), tensor.len())?;
        self.fill(&mut copy, tensor)?;
        Tensor::from_cuda(copy, tensor.shape())
    }

    fn fill(&self, to: &mut CudaBuffer, tensor: &Tensor) -> Result<()> {
        match (tensor.cuda(), tensor.dtype()) {
            (Some(from), _) if self.holds(tensor) => to.copy_from(0, from, 0..from.len()),
            (None, DType::F32) => to.write(0, bytemuck::cast_slice(tensor.f32s()?)),
            (None, DType::U32) => to.write(0, bytemuck::cast_slice(tensor.u32s()?)),
            _ => {
                let expected = "a tensor on this CUDA device, or f32 or u32 on the host";
                Err(Error::operand("graph", expected, tensor.found()))
            }
        }
    }
}

impl Recorded {
    /// Whether inputs are of the shapes and dtypes that it was recorded for.
    pub(crate) fn fits(&self, inputs: &[&Tensor]) -> bool {
        let same = |(own, given): (&Tensor, &&Tensor)| {
            own.shape() == given.shape() && own.dtype() == given.dtype()
        };
        self.inputs.len() == inputs.len() && self.inputs.iter().zip(inputs).all(same)
    }

    /// What the recorded work gives for these inputs, bit for bit, in memory of `device`.
    ///
    /// # Errors
    /// As for [`Self::launch`].
    pub(crate) fn run(&mut self, device: &CudaDevice, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let outputs = self.launch(inputs)?;
        outputs.iter().map(|output| device.copied(output)).collect()
    }

    /// What the recorded work gives for these inputs, bit for bit, where the recording has it:
    /// lent until the next launch, and to be written to at will.
    ///
    /// # Errors
    /// Inputs of another shape or dtype, or on another device; outputs of the launch before that
    /// somebody still holds; what a launch can fail with.
    pub(crate) fn launch(&mut self, inputs: &[&Tensor]) -> Result<&mut [Tensor]> {
        if !self.fits(inputs) {
            let shapes = |inputs: &mut dyn Iterator<Item = &Tensor>| {
                let shapes = inputs.map(|t| format!("{:?}", t.shape()));
                shapes.collect::<Vec<_>>().join(" and ")
            };
            let expected = format!("inputs of {}", shapes(&mut self.inputs.iter()));
            let found = shapes(&mut inputs.iter().copied());
            return Err(Error::operand("graph", expected, found));
        }
        if self.outputs.iter_mut().any(Tensor::is_shared) {
            let expected = "outputs that nobody holds any more";
            return Err(Error::operand("graph", expected, "one that is held"));
        }
        for (own, given) in self.inputs.iter_mut().zip(inputs) {
            let found = own.found();
            let own = own.cuda_mut();
            let own = own.ok_or_else(|| Error::operand("graph", "an input of its own", found))?;
            self.device.fill(own, given)?;
        }
        for graph in &self.graphs {
            graph.launch().map_err(|e| {
                let what = format!("launching a recorded graph: {}", error_name(e));
                Error::cuda(self.device.ordinal(), what)
            })?;
        }
        Ok(&mut self.outputs)
    }

    /// What the last launch gave, as it lent it.
    pub(crate) fn outputs(&mut self) -> &mut [Tensor] {
        &mut self.outputs
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // Given back here, since a tensor that the work left elsewhere, such as a table that is
        // made once, keeps the memory's list of free blocks.
        self.inputs.clear();
        self.outputs.clear();
        self.device.release_memory();
    }
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (inputs, outputs) = (&self.inputs, &self.outputs);
        write!(f, "Recorded {{ inputs: {inputs:?}, outputs: {outputs:?} }}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upload(cuda: &CudaDevice, seed: usize) -> Tensor {
        let values = (0..1000).map(|i| ((i * 37 + seed * 101) % 255) as f32 - 127.0);
        let values = Tensor::from_vec(values.collect(), [10, 100]).unwrap();
        cuda.resident(&values, DType::Bf16).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_f32().unwrap().f32s().unwrap().to_vec()
    }

    /// 2 (a + b) and a + b in f32, through temporaries.
    fn sums(device: &Device, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let Device::Cuda(cuda) = device else {
            panic!("not a GPU");
        };
        let mut sum = inputs[0].clone();
        device.add_assign(&mut sum, &inputs[1])?;
        let wide = cuda.cast(&sum, DType::F32)?;
        let mut twice = sum.clone();
        device.add_assign(&mut twice, &sum)?;
        Ok(vec![twice, wide])
    }

    #[test]
    fn a_recorded_part_gives_the_same_bits_for_other_inputs_and_allocates_nothing_more() {
        let Some(cuda) = CudaDevice::for_tests(1) else {
            return;
        };
        let eager = Device::Cuda(cuda.clone());
        let first = [upload(&cuda, 1), upload(&cuda, 2)];
        let in_two = |device: &Device, inputs: &[Tensor], cut: Cut| {
            let before = sums(device, inputs)?;
            cut()?;
            sums(device, &[before[0].clone(), inputs[1].clone()])
        };
        let mut recorded = cuda.record(&first.each_ref(), in_two).unwrap();
        assert_eq!(recorded.graphs.len(), 2);
        let mut kept = Vec::new();
        let mut reserved = 0;
        for seed in 0..4 {
            let inputs = [upload(&cuda, seed), upload(&cuda, 7 * seed)];
            let want = in_two(&eager, &inputs, &|| Ok(())).unwrap();
            let got = recorded.run(&cuda, &inputs.each_ref()).unwrap();
            for (got, want) in got.iter().zip(&want) {
                assert_eq!((got.dtype(), values(got)), (want.dtype(), values(want)));
            }
            match seed {
                0 | 1 => kept.push((got, want)),
                2 => reserved = cuda.reserved_memory(),
                _ => assert_eq!(cuda.reserved_memory(), reserved),
            }
        }
        // Results of earlier runs are not those of the last one.
        for (got, want) in kept {
            assert_eq!(values(&got[0]), values(&want[0]));
        }
        let other = upload(&cuda, 1).reshape([1000]).unwrap();
        let error = recorded
            .run(&cuda, &[&other, &other])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("[10, 100]") && error.contains("[1000]"),
            "{error}"
        );
    }

    #[test]
    fn copies_and_allocations_cannot_be_recorded_and_the_device_goes_on_after_it() {
        let Some(cuda) = CudaDevice::for_tests(1) else {
            return;
        };
        let x = upload(&cuda, 1);
        let reads = |_: &Device, inputs: &[Tensor]| -> Result<Vec<Tensor>> {
            Ok(vec![inputs[0].to_f32()?])
        };
        let writes = |device: &Device, _: &[Tensor]| -> Result<Vec<Tensor>> {
            let host = Tensor::from_vec(vec![1.0; 5], [5])?;
            Ok(vec![device.resident(&host)?])
        };
        let calls = std::cell::Cell::new(0);
        let grows = |device: &Device, inputs: &[Tensor]| -> Result<Vec<Tensor>> {
            calls.set(calls.get() + 1);
            let held = (0..calls.get()).map(|_| sums(device, inputs));
            Ok(held.collect::<Result<Vec<_>>>()?.swap_remove(0))
        };
        type Work<'a> = &'a dyn Fn(&Device, &[Tensor]) -> Result<Vec<Tensor>>;
        let cases: [(Work, &str); 3] = [(&reads, "copy"), (&writes, "copy"), (&grows, "memory")];
        for (work, what) in cases {
            let recorded = cuda.record(&[&x, &x], |device, inputs, _| work(device, inputs));
            let error = recorded.unwrap_err().to_string();
            assert!(
                error.contains("recorded") && error.contains(what),
                "{error}"
            );
            let again = sums(&Device::Cuda(cuda.clone()), &[x.clone(), x.clone()]).unwrap();
            assert_eq!(values(&again[1])[0], 2.0 * values(&x)[0]);
        }
    }

    #[test]
    fn a_recording_without_memory_takes_what_its_device_keeps_for_reuse() {
        let Some(cuda) = CudaDevice::for_tests(1) else {
            return;
        };
        drop(upload(&cuda, 1));
        assert!(cuda.reserved_memory() > 0);
        // A terabyte; no more than the asking matters.
        let error = cuda.beside().alloc(DType::F32, 1 << 38).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert_eq!(cuda.reserved_memory(), 0);
    }
}
