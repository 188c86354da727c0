// Recording what a stream is given as a CUDA graph, parts of it on conditions that the device knows.
#pragma once

#include "launch.cuh"

namespace spaceport {
namespace cuda {

// Records what queue(stream) queues on a stream of its own; begin(stream) says into which graph.
template <class Begin, class Queue>
cudaGraph_t captured(Begin&& begin, Queue&& queue) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "graph");
  cudaGraph_t graph = nullptr;
  cudaError_t error = begin(stream);
  std::string failure;
  if (error == cudaSuccess) {
    try {
      queue(stream);
    } catch (const std::exception& thrown) {
      failure = thrown.what();
    }
    error = cudaStreamEndCapture(stream, &graph);
  }
  cudaStreamDestroy(stream);
  if (!failure.empty()) throw std::runtime_error(failure);
  check(error, "graph");
  return graph;
}

// The recorded sequence, ready to be launched.
template <class Queue>
cudaGraphExec_t recorded(Queue&& queue) {
  cudaGraph_t graph = captured(
      [](cudaStream_t stream) { return cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal); }, queue);
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "graph");
  return executable;
}

#if CUDART_VERSION >= 12040

// Whether a graph can decide for itself what to do.
inline bool has_conditions() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "graph");
  return driver >= 12040;
}

__global__ static void set_condition_kernel(cudaGraphConditionalHandle handle, const uint32_t* condition,
                                            uint32_t* n_times) {
  cudaGraphSetConditional(handle, *condition);
  *n_times += *condition;
}

// What a stream that is being captured has come to.
struct Captured {
  cudaGraph_t graph;
  const cudaGraphNode_t* ends;
  size_t n_ends;

  static Captured by(cudaStream_t stream) {
    Captured c;
    cudaStreamCaptureStatus status;
#if CUDART_VERSION >= 13000
    check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &c.graph, &c.ends, nullptr, &c.n_ends), "graph");
#else
    check(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &c.graph, &c.ends, &c.n_ends), "graph");
#endif
    return c;
  }
};

// Records what queue(stream) queues, to happen where *condition is 1 when the graph comes to it; *n_times counts that.
template <class Queue>
void record_if(cudaStream_t stream, const uint32_t* condition, uint32_t* n_times, Queue&& queue) {
  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, Captured::by(stream).graph, 0, cudaGraphCondAssignDefault), "graph");
  set_condition_kernel<<<1, 1, 0, stream>>>(handle, condition, n_times);
  const Captured before = Captured::by(stream);
  cudaGraphNodeParams of_node = {};
  of_node.type = cudaGraphNodeTypeConditional;
  of_node.conditional.handle = handle;
  of_node.conditional.type = cudaGraphCondTypeIf;
  of_node.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&node, before.graph, before.ends, nullptr, before.n_ends, &of_node), "graph");
#else
  check(cudaGraphAddNode(&node, before.graph, before.ends, before.n_ends, &of_node), "graph");
#endif
  captured(
      [&](cudaStream_t side) {
        return cudaStreamBeginCaptureToGraph(side, of_node.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                             cudaStreamCaptureModeThreadLocal);
      },
      queue);
#if CUDART_VERSION >= 13000
  check(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies), "graph");
#else
  check(cudaStreamUpdateCaptureDependencies(stream, &node, 1, cudaStreamSetCaptureDependencies), "graph");
#endif
}

#else

inline bool has_conditions() {
  return false;
}
template <class Queue>
void record_if(cudaStream_t, const uint32_t*, uint32_t*, Queue&&) {}

#endif

}  // namespace cuda
}  // namespace spaceport
