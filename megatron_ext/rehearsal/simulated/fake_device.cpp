// A CUDA device that does nothing. torch's CPU build has none, and without one its autograd engine and its generators
// refuse CUDA tensors, fake ones included. Loaded before `import torch`, which asks once whether there is a device.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace fake_device {
using namespace c10;

constexpr DeviceIndex kDevices = 8;
thread_local DeviceIndex current = 0;

Stream default_stream() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, current)); }

struct Guard final : public impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  Stream getStream(Device) const override { return default_stream(); }
  Stream getDefaultStream(Device) const override { return default_stream(); }
  Stream getNewStream(Device, int) const override { return default_stream(); }
  Stream exchangeStream(Stream) const override { return default_stream(); }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Generator final : public GeneratorImpl {
  explicit Generator(DeviceIndex index)
      : GeneratorImpl(Device(DeviceType::CUDA, index < 0 ? current : index), DispatchKeySet(DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { seed_ = seed; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_ = 0; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  void set_state(const TensorImpl&) override {}
  intrusive_ptr<TensorImpl> get_state() const override {
    auto state = at::empty({16}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
    state.zero_();
    return state.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->seed_ = seed_;
    return copy;
  }

 private:
  uint64_t seed_ = 0, offset_ = 0;
};
}  // namespace fake_device

namespace at {
struct FakeCUDAHooks : public CUDAHooksInterface {
  explicit FakeCUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return fake_device::kDevices; }
  int getNumGPUs() const override { return fake_device::kDevices; }
  DeviceIndex current_device() const override { return fake_device::current; }
  DeviceIndex getCurrentDevice() const override { return fake_device::current; }
  void setCurrentDevice(DeviceIndex device) const override { fake_device::current = device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    DeviceIndex before = fake_device::current;
    fake_device::current = device;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = make_generator<fake_device::Generator>(DeviceIndex(0));
    return generator;
  }
  Generator getNewGenerator(DeviceIndex index) const override {
    return make_generator<fake_device::Generator>(index);
  }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void deviceSynchronize(DeviceIndex) const override {}
};

// torch looks the hooks up under this name.
static RegistererCUDAHooksRegistry registered(
    "CUDAHooks", CUDAHooksRegistry(), RegistererCUDAHooksRegistry::DefaultCreator<FakeCUDAHooks>, "FakeCUDAHooks");
}  // namespace at
