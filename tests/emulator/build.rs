//! Gives the shared library the name under which CUDA programs look for the driver: once it
//! is loaded, `dlopen("libcuda.so")` finds it without any environment variable.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    }
}
