// A frame to patches on the GPU: the calls of kernels/gpu/frame.py, and the tables they read.
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "gpu/launch.h"
#include "gpu/resize_table.h"

namespace streamo::gpu {
namespace {

constexpr int32_t kColumns = 64, kLines = 16, kPixels = 1024;  // of frame.py
constexpr int32_t kLargestSide = 16384;
constexpr size_t kTablesKept = 8;

// Tables of the sizes seen last: a camera keeps its size.
std::shared_ptr<const ResizeTable> table_for(int32_t size, int32_t new_size) {
  static std::mutex mutex;
  static std::vector<std::shared_ptr<const ResizeTable>> kept;
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& table : kept) {
    if (table->size == size && table->new_size == new_size) return table;
  }
  auto table = std::make_shared<const ResizeTable>(make_resize_table(size, new_size));
  if (kept.size() >= kTablesKept) kept.erase(kept.begin());
  kept.push_back(table);
  return table;
}

// A table's arrays one behind the other, each at a multiple of 64 bytes.
struct Packed {
  size_t counts, weights, end;  // in numbers; starts are at 0

  explicit Packed(const ResizeTable& table)
      : counts(round_up(table.starts.size())),
        weights(counts + round_up(table.counts.size())),
        end(weights + round_up(table.weights.size())) {}

  static size_t round_up(size_t count) { return (count + 15) / 16 * 16; }

  void write(const ResizeTable& table, int32_t* to) const {
    std::memcpy(to, table.starts.data(), table.starts.size() * sizeof(int32_t));
    std::memcpy(to + counts, table.counts.data(), table.counts.size() * sizeof(int32_t));
    std::memcpy(to + weights, table.weights.data(), table.weights.size() * sizeof(int32_t));
  }
};

// Colour differences to RGB, in 2^-20.
struct Colours {
  int32_t black = 0, luma = 0, red_v = 0, green_u = 0, green_v = 0, blue_u = 0;
};

Colours colours_of(bool full_range, bool bt709) {
  const double red = bt709 ? 0.2126 : 0.299, blue = bt709 ? 0.0722 : 0.114, green = 1.0 - red - blue;
  const double luma = full_range ? 1.0 : 255.0 / 219.0, difference = full_range ? 1.0 : 255.0 / 224.0;
  const auto fixed = [](double value) { return static_cast<int32_t>(std::lround(value * (1 << 20))); };
  Colours colours;
  colours.black = full_range ? 0 : 16;
  colours.luma = fixed(luma);
  colours.red_v = fixed(2.0 * (1.0 - red) * difference);
  colours.blue_u = fixed(2.0 * (1.0 - blue) * difference);
  colours.green_u = fixed(-2.0 * (1.0 - blue) * blue / green * difference);
  colours.green_v = fixed(-2.0 * (1.0 - red) * red / green * difference);
  return colours;
}

struct Pieces {
  uint8_t* narrow;   // (3, height, new_width)
  int32_t* columns;  // tables
  int32_t* lines;
};

Pieces cut(Workspace& workspace, const streamo_gpu_frame& a, const Packed& columns, const Packed& lines) {
  uint8_t* narrow = workspace.take<uint8_t>(size_t{3} * a.height * a.new_width);
  int32_t* first = workspace.take<int32_t>(columns.end);
  return {narrow, first, workspace.take<int32_t>(lines.end)};
}

streamo_status check_sizes(const streamo_gpu_frame& a) {
  const auto bad = STREAMO_BAD_ARGUMENT;
  if (a.width < 1 || a.height < 1 || a.width > kLargestSide || a.height > kLargestSide) {
    return refuse(bad, "frame: expected sides of 1 to %d pixels, found %dx%d", kLargestSide, a.width, a.height);
  }
  if (a.patch < 1 || a.merge < 1 || a.patch > 256 || a.merge > 16) {
    return refuse(bad, "frame: expected patches of 1 to 256 pixels merged by 1 to 16, found %d and %d", a.patch, a.merge);
  }
  const int32_t side = a.patch * a.merge;
  if (a.new_width < side || a.new_height < side || a.new_width % side != 0 || a.new_height % side != 0 ||
      a.new_width > kLargestSide || a.new_height > kLargestSide) {
    return refuse(bad, "frame: expected a new size of multiples of %d pixels up to %d, found %dx%d", side, kLargestSide,
                  a.new_width, a.new_height);
  }
  if (static_cast<int64_t>(a.height) * a.new_width > (1 << 29)) {
    return refuse(STREAMO_UNSUPPORTED, "frame: expected at most %d pixels between the passes, found %dx%d", 1 << 29,
                  a.new_width, a.height);
  }
  return STREAMO_OK;
}

streamo_status check(const streamo_gpu_frame* a) {
  const auto bad = STREAMO_BAD_ARGUMENT;
  if (a == nullptr) return refuse(bad, "frame: expected arguments, found NULL");
  if (a->pixels != STREAMO_GPU_PIXELS_RGB && a->pixels != STREAMO_GPU_PIXELS_NV12) {
    return refuse(bad, "frame: expected pixels 0 (RGB) or 1 (NV12), found %d", a->pixels);
  }
  if (const streamo_status status = check_sizes(*a)) return status;
  const bool nv12 = a->pixels == STREAMO_GPU_PIXELS_NV12;
  if (a->plane == nullptr || a->output == nullptr || (nv12 && a->chroma == nullptr)) {
    return refuse(bad, "frame: expected pixels and an output, found NULL");
  }
  if (nv12 && (a->width % 2 != 0 || a->height % 2 != 0)) {
    return refuse(bad, "frame: expected even sides for NV12, found %dx%d", a->width, a->height);
  }
  const int64_t row = nv12 ? a->width : int64_t{3} * a->width;
  if (a->plane_stride < row || (nv12 && a->chroma_stride < a->width)) {
    return refuse(bad, "frame: expected rows at least %lld bytes apart, found %lld",
                  static_cast<long long>(nv12 ? a->width : row),
                  static_cast<long long>(a->plane_stride < row ? a->plane_stride : a->chroma_stride));
  }
  for (int channel = 0; channel < 3; ++channel) {
    if (!(a->deviation[channel] > 0)) {
      return refuse(bad, "frame: expected deviations above 0, found %g", static_cast<double>(a->deviation[channel]));
    }
  }
  return check_aligned("frame", a->output);
}

streamo_status send(streamo_gpu* gpu, const ResizeTable& table, const Packed& packed, int32_t* device, void* stream) {
  std::vector<int32_t> numbers(packed.end);
  packed.write(table, numbers.data());
  return upload(gpu, device, numbers.data(), numbers.size() * sizeof(int32_t), stream);
}

streamo_status run(streamo_gpu* gpu, const streamo_gpu_frame& a, void* memory, size_t bytes, void* stream) {
  const auto columns = table_for(a.width, a.new_width), lines = table_for(a.height, a.new_height);
  const Packed column_places(*columns), line_places(*lines);
  Workspace workspace(memory, bytes);
  const Pieces pieces = cut(workspace, a, column_places, line_places);
  streamo_status status = workspace.check("frame");
  if (status == STREAMO_OK) status = send(gpu, *columns, column_places, pieces.columns, stream);
  if (status == STREAMO_OK) status = send(gpu, *lines, line_places, pieces.lines, stream);
  if (status != STREAMO_OK) return status;
  const bool nv12 = a.pixels == STREAMO_GPU_PIXELS_NV12;
  const Colours c = nv12 ? colours_of(a.full_range != 0, a.bt709 != 0) : Colours{};
  const Grid narrow{static_cast<uint32_t>((a.new_width + kColumns - 1) / kColumns),
                    static_cast<uint32_t>((a.height + kLines - 1) / kLines)};
  status = launch(gpu, nv12 ? "frame_columns_nv12" : "frame_columns_rgb", narrow, stream, a.plane, a.chroma,
                  pieces.columns, pieces.columns + column_places.counts, pieces.columns + column_places.weights,
                  pieces.narrow, a.height, a.new_width, columns->taps, a.plane_stride, a.chroma_stride, c.black, c.luma,
                  c.red_v, c.green_u, c.green_v, c.blue_u);
  if (status != STREAMO_OK) return status;
  const int32_t patches = (a.new_height / a.patch) * (a.new_width / a.patch);
  const Grid grid{static_cast<uint32_t>(patches),
                  static_cast<uint32_t>((3 * a.patch * a.patch + kPixels - 1) / kPixels)};
  const float most = 255.0f;
  return launch(gpu, "frame_patches", grid, stream, pieces.narrow, pieces.lines, pieces.lines + line_places.counts,
                pieces.lines + line_places.weights, a.output, a.height, a.new_height, a.new_width, lines->taps, a.patch,
                a.merge, a.mean[0] * most, a.mean[1] * most, a.mean[2] * most, a.deviation[0] * most,
                a.deviation[1] * most, a.deviation[2] * most);
}

}  // namespace
}  // namespace streamo::gpu

extern "C" streamo_status streamo_gpu_frame_workspace(streamo_gpu* gpu, const streamo_gpu_frame* arguments,
                                                      size_t* bytes) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = gpu::check(arguments)) return status;
    if (bytes == nullptr) return refuse(STREAMO_BAD_ARGUMENT, "frame: expected a place for the size, found NULL");
    gpu::Workspace counted;
    gpu::cut(counted, *arguments, gpu::Packed(*gpu::table_for(arguments->width, arguments->new_width)),
             gpu::Packed(*gpu::table_for(arguments->height, arguments->new_height)));
    *bytes = counted.used();
    return STREAMO_OK;
  });
}

extern "C" streamo_status streamo_gpu_frame_run(streamo_gpu* gpu, const streamo_gpu_frame* arguments, void* workspace,
                                                size_t workspace_bytes, void* stream) {
  using namespace streamo;
  return gpu::on_device(gpu, [&]() -> streamo_status {
    if (const streamo_status status = gpu::check(arguments)) return status;
    return gpu::run(gpu, *arguments, workspace, workspace_bytes, stream);
  });
}
